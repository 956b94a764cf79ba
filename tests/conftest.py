"""What all tests share."""

import torch
from hypothesis import settings

# Tests run beside each other's ranks on few cores, where a second thread costs more than it brings.
torch.set_num_threads(1)
# How long an example takes says nothing on a machine that does other things, too.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")
