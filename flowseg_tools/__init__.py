"""Everything that makes FlowSeg a tool; the method is in model.py, its training in train.py.

options     every option of the command line: names, help, panel
terminal    consoles, bars, results in words, errors in one line
settings    presets, recipes, options and NAME=VALUE become configurations
predict     whole photos: resized, in windows, brought back to their own size
segment     the segment command: finds photos, plans outputs, writes and reports them
draw        masks, overlays, legends, previews, curves; pictures written whole or not at all
report      what an evaluation leaves behind: numbers, confusion matrix, sheets of the worst images
start       what a run starts from: data, weights, the state that it continues
runs        run directories: config, log, lock, signals, devices, processes
state       all that the next step depends on: written beside training, read, shared by the processes
speed       compiled parts, image loaders, DistributedDataParallel
records     what a run writes and says: weights with scores, preview, logs
describe    what `info` says of this machine, a run, a checkpoint
export      photo -> class ids as a program for other runtimes
estimate    --dry-run: FLOPs, memory, hours
pretrained  import of public PixNerd weights, and starting from other weights
dinov2      the public DINOv2 ViT, frozen, and representation alignment with it
download    fetch, verify, unpack
check       what `info` finds in a data set
init        drafts a dataset.toml
tables/     presets, recipes, downloads, habits, names in public files, label tables
"""
