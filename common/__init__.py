"""What the three applications share: frozen backbones, runtime, language scoring, training, report."""

import logging

# Lightning imports PyTorch's counter of operations, which warns if triton is missing, as it is from requirements.lock.
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
