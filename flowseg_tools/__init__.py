"""Everything that makes FlowSeg a tool; the method is in model.py, its training in train.py.

predict     whole photos: resized, in windows, brought back to their own size
segment     the segment command: finds photos, plans outputs, writes and reports them
draw        masks, overlays, legends, previews, curves; pictures written whole or not at all
report      what an evaluation leaves behind: numbers, confusion matrix, sheets of the worst images
start       what a run starts from: data, weights, the state that it continues
runs        run directories: config, log, lock, signals, devices, processes
state       all that the next step depends on: written beside training, read, shared by the processes
speed       compiled parts, image loaders, DistributedDataParallel
estimate    --dry-run: FLOPs, memory, hours
pretrained  import of public PixNerd weights, and starting from other weights
dinov2      the public DINOv2 ViT, frozen, and representation alignment with it
download    fetch, verify, unpack
check       what `info` finds in a data set
tables/     presets, recipes, downloads, names in public files, label tables
"""
