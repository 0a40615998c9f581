"""
The computation of a head: encode, decode, and a forward pass with its losses.

A head is one sparse layer of latents between two linear maps. The encoder gives a pre-activation per latent; a rule
(`latent_selection.py`) keeps a few per token; the decoder adds up the rows of the latents that stay. Dense
pre-activations and dense latents are never stored, so the memory of a step grows with k, not with the number of
latents; `ops/sparse.py` shows with numbers how. Losses are squared errors divided by one variance that the caller may
give. So the loss of a batch is the sum of the losses of its parts, whether they are micro-batches or processes.
"""

from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from ..ops import Selection, sparse_decode, sparse_encode
from ..ops.metrics import squared_error
from ..ops.metrics import total_variance as variance_of
from .input_norm import normalize
from .latent_selection import first_thresholds, smallest_active, step_function, topk
from .outputs import HeadOutput, Latents
from .pretrained_head import PreTrainedHead


# See arXiv:2406.04093, section 5.1: the loss contains FVU at 4 * k latents with weight 1/8.
MULTI_TOPK_FACTOR = 4
MULTI_TOPK_WEIGHT = 1 / 8
# With batchtopk, the threshold moves by this fraction towards each batch's smallest activation.
THRESHOLD_RATE = 0.01


class HeadModel(PreTrainedHead):
    """Base class of [`SaeModel`] and [`TranscoderModel`]: one sparse layer of latents between two linear maps."""

    def encode(self, activations: Tensor) -> Latents:
        """
        The active latents of each token.

        Args:
            activations (`torch.Tensor` of shape `(..., d_in)`): The head's input.

        Returns:
            [`Latents`]: activations and indices, each `(..., k)`.

        Raises:
            `ValueError`: if the last dimension is not `d_in`.

        Examples:
            ```python
            latents = sae.encode(hidden)  # hidden: (1, num_tokens, d_in)
            strongest = latents.top_acts[0, -1].argmax()  # at the last token
            latents.top_indices[0, -1, strongest]
            ```
        """
        tokens, _ = normalize(self._tokens(activations), self.config.normalize_input)  # (num_tokens, d_in)
        values, selection, _ = self._encode(tokens, self.config.k or 0)  # (num_tokens, k)
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
            top_acts (`torch.Tensor` of shape `(..., k)` or [`Latents`]): Activations of the latents; or the result of
                `encode`, which holds the indices as well.
            top_indices (`torch.LongTensor` of shape `(..., k)`, *optional*): Indices of the latents. Required unless
                `top_acts` is [`Latents`].
            activations (`torch.Tensor` of shape `(..., d_in)`, *optional*): The head's input. Required if the head has
                a skip connection or normalises its input.

        Returns:
            `torch.Tensor` of shape `(..., d_out)`.

        Raises:
            `ValueError`: if the head was loaded without its decoder, or `top_indices` or `activations` is missing.

        Examples:
            ```python
            sae.decode(sae.encode(hidden))

            top_acts, top_indices = sae.encode(hidden)
            without_first = sae.decode(top_acts.where(top_indices != 0, 0), top_indices)  # ablates latent 0
            transcoder.decode(transcoder.encode(hidden), activations=hidden)
            ```
        """
        if isinstance(top_acts, Latents):
            top_acts, top_indices = top_acts
        if top_indices is None:
            raise ValueError(
                "top_indices is missing: decode needs the indices of the latents. Call decode(top_acts, top_indices), "
                "or decode(latents) with the result of encode."
            )
        shape = (*top_acts.shape[:-1], self.config.d_out)
        acts = top_acts.reshape(-1, top_acts.shape[-1])  # (num_tokens, k)
        # Zeros that fill shorter rows need no work, unless a caller wants the gradients of acts.
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
        Reconstructs `target` from `activations`, and computes the losses.

        Args:
            activations (`torch.Tensor` of shape `(..., d_in)`): The head's input.
            target (`torch.Tensor` of shape `(..., d_out)`, *optional*): The activations that the head should
                reproduce; `activations` if not given.
            k (`int`, *optional*): Active latents per token, or their target with `jumprelu`; the config's k if not
                given.
            total_variance (`torch.Tensor` of shape `()`, *optional*): The number that squared errors are divided by;
                the variance of `target` over these tokens if not given. A caller that passes one part of a batch gives
                the variance of the whole batch.
            dead_mask (`torch.BoolTensor` of shape `(num_latents,)`, *optional*): Dead latents, for AuxK. See
                arXiv:2406.04093, appendix A.2. The AuxK loss is divided by the target's variance and, while fewer than
                `d_out / 2` latents are dead, scaled down in proportion to their number.
            auxk_alpha (`float`, defaults to 1): Weight of the AuxK loss.
            multi_topk (`bool`, defaults to `False`): Add FVU at `4 * k` latents to the loss, with weight 1/8.
            sparsity_weight (`float`, defaults to 1): Weight of the sparsity loss of `jumprelu`, which moves the mean
                L0 of these tokens to k. See arXiv:2407.14435. One part of a batch counts in proportion to its
                variance.
            return_loss (`bool`, defaults to `True`): Whether to compute losses; `False` only reconstructs.
            return_dict (`bool`, *optional*): `False` returns a plain tuple.

        Returns:
            [`HeadOutput`].

        Raises:
            `ValueError`: if a width is wrong, the head has no decoder, or `multi_topk` does not fit the activation.

        Examples:
            ```python
            output = sae(hidden)
            output.fvu, output.reconstruction.shape
            output.loss.backward()

            transcoder(hidden, return_loss=False).reconstruction
            ```
        """
        tokens = self._tokens(activations)  # (num_tokens, d_in)
        k = self._wanted_k(k, multi_topk)
        # values: (num_tokens, n), with n = 4 * k for multi_topk, else k
        values, selection, dead = self._encode(
            normalize(tokens, self.config.normalize_input)[0],
            self._multi_topk_width(k) if multi_topk else k,
            dead_mask,
        )
        columns = self._here(k) if multi_topk else values.shape[1]
        chosen = selection.columns(0, columns)
        acts = self._activate(values[:, :columns], chosen)  # (num_tokens, k)
        reconstruction = self._decode(acts, chosen, tokens)  # (num_tokens, d_out)
        losses: dict[str, Tensor] = {}
        if return_loss:
            wanted = self._wanted(tokens, target)  # (num_tokens, d_out)
            variance = variance_of(wanted) if total_variance is None else total_variance
            # Identical tokens have no variance; their losses and gradients must stay finite all the same.
            denominator = torch.where(variance.gt(0), variance, 1.0)
            losses["fvu"] = squared_error(wanted, reconstruction) / denominator
            if dead is not None and dead_mask is not None:
                residual = wanted - reconstruction.detach()  # (num_tokens, d_out)
                losses["auxk_loss"] = self._auxk_error(*dead, dead_mask, residual) / denominator
            if multi_topk:
                wide = self._decode(self._activate(values, selection), selection, tokens)  # (num_tokens, d_out)
                losses["multi_topk_fvu"] = squared_error(wanted, wide) / denominator
            if self._has_sparsity_loss:
                l0 = self._summed(self._steps(values, chosen).sum()) / max(len(tokens), 1)  # ()
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
        Sets `b_dec` to the target's mean, and the encoder's bias so that the mean input has pre-activations of zero.

        Args:
            input_mean (`torch.Tensor` of shape `(d_in,)`): Mean of the head's input over tokens.
            target_mean (`torch.Tensor` of shape `(d_out,)`): Mean of the target over tokens.

        Examples:
            ```python
            mean = hidden.flatten(0, -2).mean(0)
            sae.initialize_biases(mean, mean)
            ```
        """
        self.b_dec.copy_(target_mean)
        centre = input_mean.to(self.b_dec) - (self.b_dec if self.config.apply_b_dec_to_input else 0)
        self.encoder.bias.copy_(-(self.encoder.weight @ centre))

    @torch.no_grad()
    def initialize_threshold(self, activations: Tensor) -> None:
        """
        Sets learnt thresholds so that each latent is active on `k / num_latents` of the tokens: L0 starts at k.

        Heads without learnt thresholds stay as they are.

        Args:
            activations (`torch.Tensor` of shape `(num_tokens, d_in)`): The head's input.

        Examples:
            ```python
            from sae_accel import SaeConfig, SaeModel

            sae = SaeModel(SaeConfig(d_in=24, num_latents=96, k=8, activation="jumprelu"))
            sae.initialize_threshold(torch.randn(256, 24))
            sae.threshold.shape  # (96,)
            ```
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
        Moves the threshold that `batchtopk` uses after training towards the smallest activation of a batch. See
        arXiv:2412.06410.

        Args:
            smallest_act (`torch.Tensor` of shape `()`): The `smallest_act` of [`HeadOutput`], over the whole batch. 0
                means that no latent was active, and changes nothing.

        Examples:
            ```python
            from sae_accel import SaeConfig, SaeModel

            sae = SaeModel(SaeConfig(d_in=24, num_latents=96, k=8, activation="batchtopk")).train()
            sae.observe_smallest(sae(torch.randn(64, 24)).smallest_act)
            ```
        """
        first = self.threshold == 0
        moved = torch.where(first, smallest_act, self.threshold.lerp(smallest_act, THRESHOLD_RATE))
        self.threshold.copy_(torch.where(smallest_act > 0, moved, self.threshold))

    @property
    def learns_threshold(self) -> bool:
        """Whether the head has a threshold that a gradient moves. The sparsity loss keeps L0 at k."""
        return "threshold" in self._selection.parameters

    @property
    def _has_sparsity_loss(self) -> bool:
        return self.learns_threshold and self.training

    def _steps(self, values: Tensor, selection: Selection) -> Tensor:
        return step_function(selection.flat(values), self.threshold[selection.latents], self.config.bandwidth)

    def _smallest(self, acts: Tensor) -> Tensor | None:
        return smallest_active(acts) if self.training and self.config.activation == "batchtopk" else None

    def _activate(self, values: Tensor, selection: Selection) -> Tensor:
        uses = selection.flat(self._largest(values))  # (num_pairs,)
        return selection.by_token(self._selection.activate(self, uses, selection.latents))

    def _here(self, k: int) -> int:
        """The number of columns that this process selects per token, for k latents of the whole head."""
        # With topk all k winners may lie in one slice; with groupmax each group of a slice has one winner.
        if self.latent_slice is None or self.config.activation != "groupmax":
            return k
        return k * self.num_latents // self.config.num_latents

    def _largest(self, values: Tensor) -> Tensor:
        """The selected values, with `-inf` for each one that loses against other processes' values."""
        if self.latent_slice is None or self.config.activation == "groupmax" or not self._selection.counts:
            return values
        return self.latent_slice.largest(values)

    def _summed(self, part: Tensor) -> Tensor:
        """The sum of a tensor over the processes that hold latents of this head."""
        return part if self.latent_slice is None else self.latent_slice.sum(part)

    def _encode(
        self, tokens: Tensor, k: int, dead_mask: Tensor | None = None
    ) -> tuple[Tensor, Selection, tuple[Tensor, Selection] | None]:
        """
        Pre-activations of the selected latents; and of each token's `d_out / 2` largest dead latents, if there is a
        mask.
        """
        choose, aux = self._selection, 0 if dead_mask is None else self._k_aux

        def select(pre_activations: Tensor) -> tuple[Tensor, Tensor]:
            # pre_activations: (piece, num_latents)
            values, indices = choose.select(self, pre_activations, self._here(k))  # (piece, n) each
            if dead_mask is None:
                return values, indices
            # Dead latents come first, because pieces may differ in how many columns follow.
            dead = topk(pre_activations.masked_fill_(~dead_mask, -torch.inf), aux)  # (piece, aux) each
            return torch.cat([dead[0], values], -1), torch.cat([dead[1], indices], -1)

        def settle(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
            assert choose.settle is not None, "settle is passed on only if the activation has one"
            kept = choose.settle(self, values[:, aux:], indices[:, aux:], k)  # (num_tokens, m) each
            if not aux:
                return kept
            return torch.cat([values[:, :aux], kept[0]], -1), torch.cat([indices[:, :aux], kept[1]], -1)

        shift: Tensor | None = self.b_dec if self.config.apply_b_dec_to_input else None
        if shift is not None and self.latent_slice is not None:
            shift = self.latent_slice.shared(shift)
        weights, settling = (self.encoder.weight, self.encoder.bias, shift), settle if choose.settle else None
        # values: (num_tokens, aux + n), the dead latents in the first aux columns
        values, selection = sparse_encode(tokens, *weights, select, settling, is_ragged=not choose.counts)
        if not aux:
            return values, selection, None
        return values[:, aux:], selection.columns(aux, None), (values[:, :aux], selection.columns(0, aux))

    def _decode(self, acts: Tensor, selection: Selection, tokens: Tensor | None) -> Tensor:
        decoder = self.decoder_rows
        if tokens is None and (self.W_skip is not None or self.config.normalize_input is not None):
            what = "has a skip connection" if self.W_skip is not None else "normalises its input"
            raise ValueError(
                f"activations is missing: the head {what}, so decode needs its input. Call decode(latents, "
                "activations=activations)."
            )
        reconstruction = self._summed(sparse_decode(acts, selection, decoder)) + self.b_dec  # (num_tokens, d_out)
        if tokens is None:
            return reconstruction
        if self.config.normalize_input is not None:
            reconstruction = normalize(tokens, self.config.normalize_input)[1](reconstruction)
        if self.W_skip is not None:
            reconstruction = reconstruction + nn.functional.linear(tokens, self.W_skip)
        return reconstruction

    def _auxk_error(self, values: Tensor, dead: Selection, dead_mask: Tensor, residual: Tensor) -> Tensor:
        # If few latents are dead, living ones with a pre-activation of -inf fill the rest; ReLU makes them 0.
        foremost = values if self.latent_slice is None else self.latent_slice.largest(values)  # (num_tokens, aux)
        estimate = self._summed(sparse_decode(nn.functional.relu(foremost), dead, self.decoder_rows))
        return squared_error(residual, estimate) * (self._summed(dead_mask.sum()) / self._k_aux).clamp(max=1.0)

    @property
    def _k_aux(self) -> int:
        return min(max(self.config.d_out // 2, 1), self.config.num_latents)

    def _multi_topk_width(self, k: int) -> int:
        width = MULTI_TOPK_FACTOR * k
        if not self._selection.nests or width > self.config.num_latents:
            raise ValueError(
                f"multi_topk selects 4 * k = {width} latents with topk, but the head has activation "
                f"{self.config.activation!r} and {self.config.num_latents} latents. Set multi_topk=False, or lower k."
            )
        return width

    def _tokens(self, activations: Tensor) -> Tensor:
        if activations.shape[-1] != self.config.d_in:
            raise ValueError(
                f"activations has shape {tuple(activations.shape)}, but its last dimension must be "
                f"d_in = {self.config.d_in}. Pass the activation of the head's hookpoint."
            )
        return activations.reshape(-1, self.config.d_in).to(self.dtype)

    def _wanted_k(self, k: int | None, multi_topk: bool) -> int:
        """Latents per token; 0 if k is unknown and nothing needs it."""
        if k is None and (multi_topk or self.training and not self._selection.counts):
            return self.config.trained_k
        return (self.config.k if k is None else k) or 0

    def _wanted(self, tokens: Tensor, target: Tensor | None) -> Tensor:
        if target is not None:
            return target.reshape(-1, self.config.d_out)
        if self.config.d_out != self.config.d_in:
            raise ValueError(
                f"target is missing: the head reads activations of width {self.config.d_in} and predicts others of "
                f"width {self.config.d_out}. Give target, or set return_loss=False to only reconstruct."
            )
        return tokens
