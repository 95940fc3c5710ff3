"""`obsdiff inspect`: what is in a checkpoint, or what obsdiff_export finds. Only our checkpoints need torch."""

from pathlib import Path

from obsdiff.inspection import checkpoints
from obsdiff.inspection.checkpoints import CheckpointContent
from obsdiff_export import inspection
from obsdiff_runtime.progress import Progress, silent

Content = CheckpointContent | inspection.Content


def inspect(path: Path, progress: Progress = silent) -> Content:
    """What is there; see obsdiff_export.inspection.inspect.

    Raises:
        BundleError: a checkpoint that is incomplete; names the file.
    """
    if path.is_dir() and not inspection.is_bundle(path) and checkpoints.is_checkpoint(path):
        return checkpoints.read(path, progress)
    return inspection.inspect(path, progress)
