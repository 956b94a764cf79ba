"""What all tests share."""

import torch

# Tests run beside each other's ranks on few cores, where a second thread costs more than it brings.
torch.set_num_threads(1)
