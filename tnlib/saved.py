"""Models on disk, dense or compressed, behind one name; the only place that knows how a compressed one is kept."""

import json
import shutil
from pathlib import Path

from tnlib.assets import load_model, load_tokenizer
from tnlib.quant import Quantize
from tnlib.quantize import quantize_
from tnlib.records import write_atomic
from tnlib.resume import load_weights_, save_weights
from tnlib.streamed import FACTS, load_factorized, skeleton_of
from tnlib.surgery import factorize_
