"""Where a loss begins: the states that a runnable model hands to its head, and the head itself."""

from __future__ import annotations

from typing import Any

import torch

from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.reading import stack_tokens
from nirvana_deploy.recover.learning.losses import Logits


class StatesOf:
    """Final states and logits of a runnable model of a checkpoint's family."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self.model = model
        self.shape = checkpoint.shape
        self._checkpoint = checkpoint
        self._family = checkpoint.shape.family

    def read(self, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each stack reads of windows [N, T]."""
        read = stack_tokens(self._family, self._checkpoint.config, windows.cpu().numpy())
        return tuple(torch.from_numpy(tokens).to(windows.device) for tokens in read)

    def states(self, windows: torch.Tensor) -> torch.Tensor:
        """States [N, T', D] behind the last norm, of the positions that the last stack reads."""
        read = self.read(windows)
        if len(read) == 1:
            states: torch.Tensor = self.model.model(input_ids=read[0], use_cache=False).last_hidden_state
            return states
        entered = self.model.encoder(input_ids=read[0]).last_hidden_state
        left = self.model.decoder(input_ids=read[1], encoder_hidden_states=entered, use_cache=False)
        states = left.last_hidden_state
        return states

    def next_tokens(self, windows: torch.Tensor) -> torch.Tensor:
        """The token [N, T'] that each of these positions is to predict; -100 at the last one."""
        following = self.read(windows)[-1].roll(-1, dims=1)
        following[:, -1] = -100
        return following

    def logits(self) -> Logits:
        """The head, as it is now, in the dtype that products have now."""
        head, scale = self.model.get_output_embeddings().weight.detach(), self._scale()
        if torch.is_autocast_enabled(head.device.type):  # once here, not for every block
            head = head.to(torch.get_autocast_dtype(head.device.type))
        return lambda states: (scale * states) @ head.T

    def _scale(self) -> float:
        if self._family.encoder_decoder:
            scaled = self._checkpoint.pretrained_config.scale_decoder_outputs
            return float(self._checkpoint.shape.hidden_size**-0.5) if scaled else 1.0
        return self._checkpoint.computation.logits_scale
