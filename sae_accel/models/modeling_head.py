from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from ..ops import Selection, sparse_decode, sparse_encode
from ..ops.metrics import squared_error
from ..ops.metrics import total_variance as variance_of
from .input_norm import normalize
from .latent_selection import first_thresholds, step_function, topk
from .outputs import HeadOutput, Latents
from .pretrained_head import PreTrainedHead


# See arXiv:2406.04093, section 5.1: FVU at 4k latents joins the loss with weight 1/8.
MULTI_TOPK_FACTOR = 4
MULTI_TOPK_WEIGHT = 1 / 8
# How far a batch's smallest activation moves the threshold that batchtopk will have once it is trained.
THRESHOLD_RATE = 0.01


class HeadModel(PreTrainedHead):
    """What [`SaeModel`] and [`TranscoderModel`] share: one sparse layer of latents between two linear maps."""

    def encode(self, activations: Tensor) -> Latents:
        """
        The active latents of each token.

        Args:
            activations (`torch.Tensor` of shape `(..., d_in)`): What the head reads.

        Returns:
            [`Latents`]: activations and indices, each `(..., k)`.

        Raises:
            `ValueError`: if the last dimension is not `d_in`.
        """
        tokens, _ = normalize(self._tokens(activations), self.config.normalize_input)
        values, selection, _ = self._encode(tokens, self.config.k or 0)
        shape = (*activations.shape[:-1], values.shape[1])
        return Latents(self._activate(values, selection).view(shape), selection.indices.view(shape))

    def decode(
        self,
        top_acts: Tensor | Latents,
        top_indices: Tensor | None = None,
        activations: Tensor | None = None,
    ) -> Tensor:
        """
        The reconstruction from activations of latents: `sum_i acts_i W_dec[i] + b_dec (+ W_skip x)`.

        Args:
            top_acts (`torch.Tensor` of shape `(..., k)` or [`Latents`]): Activations of the latents; or what `encode`
                gave, which has the indices as well.
            top_indices (`torch.LongTensor` of shape `(..., k)`, *optional*): Which they are.
            activations (`torch.Tensor` of shape `(..., d_in)`, *optional*): What the head read. Asked for where there
                is a skip connection, or the input was normalised.

        Returns:
            `torch.Tensor` of shape `(..., d_out)`.

        Raises:
            `ValueError`: if the head was loaded without its decoder, or `top_indices` or `activations` is missing.

        Examples:
            ```python
            sae.decode(sae.encode(hidden))
            sae.decode(top_acts, top_indices)
            ```
        """
        if isinstance(top_acts, Latents):
            top_acts, top_indices = top_acts
        if top_indices is None:
            raise ValueError("decode needs the indices of the latents as well. Give top_indices, or what encode gave.")
        shape = (*top_acts.shape[:-1], self.config.d_out)
        acts = top_acts.reshape(-1, top_acts.shape[-1])
        # What fills up the columns of tokens with few latents is no work, but zeros may be asked for their gradients.
        used = None if self._selection.counts or acts.requires_grad else acts != 0
        selection = Selection(top_indices.reshape(acts.shape), self.num_latents, used)
        tokens = None if activations is None else self._tokens(activations)
        return self._decode(acts, selection, tokens).view(shape)

    def forward(
        self,
        activations: Tensor,
        target: Tensor | None = None,
        *,
        k: int | None = None,
        total_variance: Tensor | None = None,
        dead_mask: Tensor | None = None,
        auxk_alpha: float = 1.0,
        multi_topk: bool = False,
        sparsity_weight: float = 1.0,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """
        Reconstructs `target` from `activations`, and measures how well.

        Args:
            activations (`torch.Tensor` of shape `(..., d_in)`): What the head reads.
            target (`torch.Tensor` of shape `(..., d_out)`, *optional*): What it should reproduce; `activations` if not
                given.
            k (`int`, *optional*): Latents that are active for each token, or are to be; the config's if not given.
            total_variance (`torch.Tensor` of shape `()`, *optional*): What squared errors are divided by; that of
                `target` over these tokens if not given. A caller with a part of a batch passes the whole batch's.
            dead_mask (`torch.BoolTensor` of shape `(num_latents,)`, *optional*): Dead latents, for AuxK. See
                arXiv:2406.04093, appendix A.2. The loss is divided by the target's variance and, while fewer than
                `d_out / 2` latents are dead, scaled down by their number.
            auxk_alpha (`float`, defaults to 1): Weight of the AuxK loss.
            multi_topk (`bool`, defaults to `False`): Add FVU at 4k latents to the loss.
            sparsity_weight (`float`, defaults to 1): Weight of the sparsity loss of `jumprelu`, by which the mean L0
                of these tokens comes to k. See arXiv:2407.14435. Of a part of a batch it counts for as much as the
                part has of the variance.
            return_loss (`bool`, defaults to `True`): `False` only reconstructs, and measures nothing.
            return_dict (`bool`, *optional*): `False` gives a plain tuple.

        Returns:
            [`HeadOutput`].

        Raises:
            `ValueError`: if a width is wrong, the head has no decoder, or `multi_topk` does not fit the activation.
        """
        tokens = self._tokens(activations)
        k = self._wanted_k(k, multi_topk)
        values, selection, dead = self._encode(
            normalize(tokens, self.config.normalize_input)[0],
            self._multi_topk_width(k) if multi_topk else k,
            dead_mask,
        )
        columns = self._here(k) if multi_topk else values.shape[1]
        chosen = selection.columns(0, columns)
        acts = self._activate(values[:, :columns], chosen)
        reconstruction = self._decode(acts, chosen, tokens)
        losses: dict[str, Tensor] = {}
        if return_loss:
            wanted = self._wanted(tokens, target)
            variance = variance_of(wanted) if total_variance is None else total_variance
            # Tokens that are all alike have no variance to explain; their losses and gradients must stay finite.
            denominator = torch.where(variance.gt(0), variance, 1.0)
            losses["fvu"] = squared_error(wanted, reconstruction) / denominator
            if dead is not None and dead_mask is not None:
                residual = wanted - reconstruction.detach()
                losses["auxk_loss"] = self._auxk_error(*dead, dead_mask, residual) / denominator
            if multi_topk:
                wide = self._decode(self._activate(values, selection), selection, tokens)
                losses["multi_topk_fvu"] = squared_error(wanted, wide) / denominator
            if self._has_sparsity_loss:
                l0 = self._summed(self._steps(values, chosen).sum()) / max(len(tokens), 1)
                own_variance = variance if total_variance is None else variance_of(wanted)
                losses["sparsity_loss"] = (l0 / k - 1) ** 2 * own_variance / denominator
            weights = {"fvu": 1.0, "auxk_loss": auxk_alpha, "multi_topk_fvu": MULTI_TOPK_WEIGHT}
            weights["sparsity_loss"] = sparsity_weight
            losses["loss"] = reduce(add, [weights[name] * loss for name, loss in losses.items()])
        leading = activations.shape[:-1]
        output = HeadOutput(
            reconstruction=reconstruction.view(*leading, self.config.d_out),
            top_acts=acts.view(*leading, acts.shape[1]),
            top_indices=chosen.indices.view(*leading, acts.shape[1]),
            smallest_act=self._smallest(acts),
            **losses,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def initialize_biases(self, input_mean: Tensor, target_mean: Tensor) -> None:
        """
        Sets `b_dec` to the mean target, and the encoder's bias so that pre-activations are centred on the mean input.

        Args:
            input_mean (`torch.Tensor` of shape `(d_in,)`): Mean over tokens of what the head reads.
            target_mean (`torch.Tensor` of shape `(d_out,)`): Mean of what it should reproduce.
        """
        self.b_dec.copy_(target_mean)
        centre = input_mean.to(self.b_dec) - (self.b_dec if self.config.apply_b_dec_to_input else 0)
        self.encoder.bias.copy_(-(self.encoder.weight @ centre))

    @torch.no_grad()
    def initialize_threshold(self, activations: Tensor) -> None:
        """
        Sets a threshold that is learnt so that each latent is active on `k / num_latents` of the tokens, so that L0
        begins at k. Does nothing for heads without one.

        Args:
            activations (`torch.Tensor` of shape `(num_tokens, d_in)`): What the head reads.
        """
        if not self.learns_threshold or not len(activations):
            return
        tokens = self._tokens(activations)
        shifted = tokens - self.b_dec if self.config.apply_b_dec_to_input else tokens
        part = self.config.trained_k / self.config.num_latents
        self.threshold.copy_(first_thresholds(shifted, self.encoder.weight, self.encoder.bias, part))

    @torch.no_grad()
    def observe_smallest(self, smallest_act: Tensor) -> None:
        """
        Moves the threshold that `batchtopk` will have after training towards the smallest activation of a batch. See
        arXiv:2412.06410.

        Args:
            smallest_act (`torch.Tensor` of shape `()`): As `forward` gives it, over the whole batch; 0, which changes
                nothing, where no latent was active.
        """
        first = self.threshold == 0
        moved = torch.where(first, smallest_act, self.threshold.lerp(smallest_act, THRESHOLD_RATE))
        self.threshold.copy_(torch.where(smallest_act > 0, moved, self.threshold))

    @property
    def learns_threshold(self) -> bool:
        """Whether there is a threshold that moves by its gradient, kept in bounds by the sparsity loss."""
        return "threshold" in self._selection.parameters

    @property
    def _has_sparsity_loss(self) -> bool:
        return self.learns_threshold and self.training

    def _steps(self, values: Tensor, selection: Selection) -> Tensor:
        return step_function(selection.flat(values), self.threshold[selection.latents], self.config.bandwidth)

    def _smallest(self, acts: Tensor) -> Tensor | None:
        if not self.training or self.config.activation != "batchtopk":
            return None
        if not acts.numel():
            return acts.new_zeros((), dtype=torch.float32)
        # Without a look at how many there are, which would wait for the device.
        smallest = torch.where(acts.gt(0), acts, torch.inf).min().detach().float()
        return torch.where(smallest.isfinite(), smallest, 0.0)

    def _activate(self, values: Tensor, selection: Selection) -> Tensor:
        uses = selection.flat(self._largest(values))
        return selection.by_token(self._selection.activate(self, uses, selection.latents))

    def _here(self, k: int) -> int:
        """Of k latents of the head, as many as are selected here."""
        # Of a slice any may be among the k largest, but of each of its groups one is the largest.
        if self.latent_slice is None or self.config.activation != "groupmax":
            return k
        return k * self.num_latents // self.config.num_latents

    def _largest(self, values: Tensor) -> Tensor:
        """Values of selected latents, without those that do not stand against other processes'."""
        if self.latent_slice is None or self.config.activation == "groupmax" or not self._selection.counts:
            return values
        return self.latent_slice.largest(values)

    def _summed(self, part: Tensor) -> Tensor:
        """What the latents here give, with what those of other processes do."""
        return part if self.latent_slice is None else self.latent_slice.sum(part)

    def _encode(
        self, tokens: Tensor, k: int, dead_mask: Tensor | None = None
    ) -> tuple[Tensor, Selection, tuple[Tensor, Selection] | None]:
        """Pre-activations of the selected latents, and of the `d_out / 2` foremost dead ones."""
        choose, aux = self._selection, 0 if dead_mask is None else self._k_aux

        def select(pre_activations: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = choose.select(self, pre_activations, self._here(k))
            if dead_mask is None:
                return values, indices
            # In front, because pieces may differ in how many columns follow.
            dead = topk(pre_activations.masked_fill_(~dead_mask, -torch.inf), aux)
            return torch.cat([dead[0], values], -1), torch.cat([dead[1], indices], -1)

        def settle(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
            assert choose.settle is not None, "asked for only where there is one"
            kept = choose.settle(self, values[:, aux:], indices[:, aux:], k)
            if not aux:
                return kept
            return torch.cat([values[:, :aux], kept[0]], -1), torch.cat([indices[:, :aux], kept[1]], -1)

        shift: Tensor | None = self.b_dec if self.config.apply_b_dec_to_input else None
        if shift is not None and self.latent_slice is not None:
            shift = self.latent_slice.shared(shift)
        weights, settling = (self.encoder.weight, self.encoder.bias, shift), settle if choose.settle else None
        values, selection = sparse_encode(tokens, *weights, select, settling, is_ragged=not choose.counts)
        if not aux:
            return values, selection, None
        return values[:, aux:], selection.columns(aux, None), (values[:, :aux], selection.columns(0, aux))

    def _decode(self, acts: Tensor, selection: Selection, tokens: Tensor | None) -> Tensor:
        decoder = self.decoder_rows
        if tokens is None and (self.W_skip is not None or self.config.normalize_input is not None):
            what = "has a skip connection" if self.W_skip is not None else "normalises its input"
            raise ValueError(f"The head {what}: decode also needs the activations that it read.")
        reconstruction = self._summed(sparse_decode(acts, selection, decoder)) + self.b_dec
        if tokens is None:
            return reconstruction
        if self.config.normalize_input is not None:
            reconstruction = normalize(tokens, self.config.normalize_input)[1](reconstruction)
        if self.W_skip is not None:
            reconstruction = reconstruction + nn.functional.linear(tokens, self.W_skip)
        return reconstruction

    def _auxk_error(self, values: Tensor, dead: Selection, dead_mask: Tensor, residual: Tensor) -> Tensor:
        # Living latents fill up the selection where few are dead; their pre-activation is -inf, and ReLU makes it 0.
        foremost = values if self.latent_slice is None else self.latent_slice.largest(values)
        estimate = self._summed(sparse_decode(nn.functional.relu(foremost), dead, self.decoder_rows))
        return squared_error(residual, estimate) * (self._summed(dead_mask.sum()) / self._k_aux).clamp(max=1.0)

    @property
    def _k_aux(self) -> int:
        return min(max(self.config.d_out // 2, 1), self.config.num_latents)

    def _multi_topk_width(self, k: int) -> int:
        width = MULTI_TOPK_FACTOR * k
        if not self._selection.nests or width > self.config.num_latents:
            raise ValueError(
                f"Multi-TopK selects {width} latents by topk, but the head has activation {self.config.activation!r} "
                f"and {self.config.num_latents} latents."
            )
        return width

    def _tokens(self, activations: Tensor) -> Tensor:
        if activations.shape[-1] != self.config.d_in:
            raise ValueError(
                f"The head reads activations of width d_in = {self.config.d_in}, but got shape "
                f"{tuple(activations.shape)}."
            )
        return activations.reshape(-1, self.config.d_in).to(self.dtype)

    def _wanted_k(self, k: int | None, multi_topk: bool) -> int:
        """Latents of each token; 0 where nobody knows and nothing asks."""
        if k is None and (multi_topk or self.training and not self._selection.counts):
            return self.config.trained_k
        return (self.config.k if k is None else k) or 0

    def _wanted(self, tokens: Tensor, target: Tensor | None) -> Tensor:
        if target is not None:
            return target.reshape(-1, self.config.d_out)
        if self.config.d_out != self.config.d_in:
            raise ValueError(
                f"The head predicts activations of width d_out = {self.config.d_out} from others: to measure it, give "
                "target; to reconstruct alone, set return_loss=False."
            )
        return tokens
