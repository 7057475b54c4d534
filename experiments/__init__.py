"""Programs that measure FlowSeg; they run from the repository and are not installed."""
