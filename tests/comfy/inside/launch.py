"""Runs a script in ComfyUI's own interpreter in one of the modes of ../settings.py: launch.py MODE SCRIPT [FLAGS...].

MODE "legacy" is the script as it is; "dynamic" has dynamic VRAM, simulated on the CPU: its patches must be in place
before anything of ComfyUI is imported, and need nothing installed there.
"""

import runpy
import sys
from pathlib import Path

mode, script, *flags = sys.argv[1:]
sys.argv = [script, *flags]
sys.path[0] = str(Path(script).parent)
if mode == "dynamic":
    sys.path.append(str(Path(__file__).resolve().parents[1] / "dynamic_vram"))
    import vram_simulation

    vram_simulation.activate()
runpy.run_path(script, run_name="__main__")
