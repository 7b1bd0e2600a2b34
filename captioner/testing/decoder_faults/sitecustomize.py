"""Make decoders obey the markers of `captioner.testing.faults`.

Python imports this module at its start where PYTHONPATH holds this directory (see `decoder_faults` there).
"""

import os
import sys

if "captioner.imaging.sandbox.child" in sys.orig_argv:
    from captioner import imaging
    from captioner.testing.faults import with_faults

    imaging.decode = with_faults(imaging.decode, os.getppid())
    imaging.squeeze = with_faults(imaging.squeeze, os.getppid())
