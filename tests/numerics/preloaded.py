"""What a run imports, most of it by name on the way: a process that has it is forked, and no fork waits for it."""

# ruff: noqa: F401 - to be there is all that is wanted of them

from __future__ import annotations

import gc

import transformers.models.clip.image_processing_pil_clip
import transformers.models.clip.modeling_clip
from torch.utils.tensorboard import SummaryWriter

from cytoclip import training

gc.freeze()  # or each fork copies what its first collection touches
