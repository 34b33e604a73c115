"""Others' weights and models: loading them, writing them back, replacing modules in place."""

from layernorm.interop.conversion import Conversion, convert
from layernorm.interop.describing import describe
from layernorm.interop.loading import export, load
from layernorm.interop.sources import SOURCES, UNSUPPORTED

__all__ = ["SOURCES", "UNSUPPORTED", "Conversion", "convert", "describe", "export", "load"]
