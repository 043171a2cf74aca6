"""The command `reparam`: its help and completion are there before PEFT and PyTorch are imported.

A module inside of `reparam_peft` could not do that, since importing it runs `reparam_peft/__init__.py` first, which registers
the method with PEFT. That file leaves it to the command line where this module is there.
"""

from __future__ import annotations

from reparam_peft.cli.app import main

__all__ = ["main"]
