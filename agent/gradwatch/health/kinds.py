"""The table of finding kinds: what each means, why it happens, what to try, and its source.

The API, the dashboard, the alerts and the documentation all read this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A pattern that gradwatch tells apart."""

    name: str
    title: str
    meaning: str
    explanation: str
    action: str
    source: str


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="vanishing",
            title="Vanishing gradients",
            meaning="The early layers receive almost no gradient, so they do not learn.",
            explanation=(
                "Backpropagation multiplies one factor a layer. When each is below 1 the product "
                "shrinks geometrically: a sigmoid's derivative is at most 0.25, so ten of them "
                "leave at most 0.25^10, about 1e-6, of the signal."
            ),
            action=(
                "Use ReLU or GELU instead of sigmoid or tanh, He or Xavier initialisation, "
                "normalisation layers, or residual connections."
            ),
            source="Hochreiter 1991; Glorot and Bengio 2010, section 4.2",
        ),
        Kind(
            name="exploding",
            title="Exploding gradients",
            meaning="Gradients are far too large somewhere, or grow without bound.",
            explanation=(
                "Backpropagation multiplies one factor a layer (or time step). When each is above "
                "1 the product grows geometrically, and one update can throw the weights far away."
            ),
            action=(
                "Clip the gradient norm (monitor.clip_grad_norm_), lower the learning rate, and "
                "check the initialisation; in a recurrent network use gates or orthogonal weights."
            ),
            source="Pascanu, Mikolov and Bengio 2013, section 2",
        ),
        Kind(
            name="dead_units",
            title="Dead units",
            meaning="Units whose gradient is exactly zero on every sample: they cannot recover.",
            explanation=(
                "A ReLU that is negative for every input has derivative 0, so neither its weights "
                "nor its bias change again. A large step or a large negative bias does this."
            ),
            action=(
                "Lower the learning rate or warm it up, start biases at 0, or use LeakyReLU or "
                "GELU; reinitialise the units that died."
            ),
            source="Lu et al. 2019, Dying ReLU and Initialization",
        ),
        Kind(
            name="non_finite",
            title="Non-finite values",
            meaning="NaN or Inf in a gradient or in the loss: from here on training is lost.",
            explanation=(
                "An operation left its domain or its range: log or sqrt of a non-positive number, "
                "0/0, exp of a large number, fp16 overflow. NaN spreads to all it touches."
            ),
            action=(
                "Look at the first layer and step named here; clamp the argument of log, sqrt and "
                "division, use log_softmax and logits losses, and check the data of that step."
            ),
            source="IEEE 754-2019, sections 6.1 and 6.2",
        ),
        Kind(
            name="saturation",
            title="Saturated activations",
            meaning="A layer's activation sits at its flat ends, so hardly any gradient passes it.",
            explanation=(
                "tanh and sigmoid are flat for large inputs: at 10 the derivative of tanh is 0 in "
                "float32. Inputs or weights that are too large drive all units there."
            ),
            action=(
                "Scale the inputs to zero mean and unit variance, start with smaller weights, add "
                "normalisation before the activation, or lower the learning rate."
            ),
            source="Glorot and Bengio 2010, section 3",
        ),
        Kind(
            name="never_updated",
            title="Layers that never change",
            meaning="Layers get gradients, but their weights stay what they were.",
            explanation=(
                "An optimizer moves the tensors it was given. A layer that was replaced or wrapped "
                "after it was built is not among them; and in 16 bits w + dw is w when dw is below "
                "a 512th of it (bfloat16)."
            ),
            action=(
                "Build the optimizer after the model is complete and on its device; keep a float32 "
                "copy of 16-bit weights; look for whatever restores the weights after a step."
            ),
            source="PyTorch documentation of torch.optim; Micikevicius et al. 2018, section 3.1",
        ),
        Kind(
            name="disconnected",
            title="Layers without gradient",
            meaning="Trainable layers are never reached by backpropagation.",
            explanation=(
                "A detach(), a no_grad block, a conversion to numpy or an output that the loss "
                "never uses cuts the graph: behind the cut .grad stays None."
            ),
            action=(
                "Look for detach, no_grad, .data or .item between this layer and the loss; freeze "
                "it (requires_grad_(False)) if it is meant to rest."
            ),
            source="PyTorch documentation, Autograd mechanics",
        ),
        Kind(
            name="missing_zero_grad",
            title="Gradients add up",
            meaning="Each step applies the sum of all gradients since the start.",
            explanation=(
                "backward() adds to .grad. Without zero_grad the sum grows as t for equal "
                "gradients and as the root of t for independent ones: a momentum of 1 that never "
                "forgets, so the weights swing ever wider."
            ),
            action="Call optimizer.zero_grad() before each backward().",
            source="PyTorch documentation of Optimizer.zero_grad",
        ),
        Kind(
            name="learning_rate_too_high",
            title="Learning rate too high",
            meaning="Single steps replace a good part of the weights, and nothing is learnt.",
            explanation=(
                "Gradient descent on a curvature c is stable below a rate of 2 / c. Beyond it each "
                "step leaps further out; ReLU units thrown below zero then stay dead."
            ),
            action=(
                "Lower the learning rate (by 10 to begin with), warm it up, clip the gradient norm."
            ),
            source="LeCun et al. 1998, Efficient BackProp, section 5; Bengio 2012, section 3.1.1",
        ),
        Kind(
            name="divergence",
            title="Divergence",
            meaning="The loss climbs far above its start, and the gradients grow with it.",
            explanation=(
                "Once a step raises the loss and the gradient grows with the error, the next step "
                "is larger still."
            ),
            action="Lower the learning rate, clip the gradient norm, go back to a checkpoint.",
            source="Goodfellow, Bengio and Courville 2016, section 8.2.4",
        ),
        Kind(
            name="oscillation",
            title="Oscillation",
            meaning="The loss bounces and does not fall.",
            explanation=(
                "Between a rate of 1 / c and 2 / c (c: the curvature) each step crosses the "
                "valley; with noise the loss hovers where crossing and sinking balance."
            ),
            action="Lower the learning rate by 3 to 10, or let it decay; larger batches help too.",
            source="LeCun et al. 1998, Efficient BackProp, section 5",
        ),
        Kind(
            name="learning_rate_too_low",
            title="Learning rate too low",
            meaning="Updates are too small to change anything in the time of this run.",
            explanation=(
                "A step changes the weights by the rate times the gradient; near 0.001 of their "
                "norm is usual. A schedule that is stepped once a batch ends long before the run."
            ),
            action=(
                "Raise the learning rate until updates are near 0.001 of the weights; check where "
                "scheduler.step() is called."
            ),
            source="Bengio 2012, Practical recommendations, section 3.1.1",
        ),
        Kind(
            name="loss_spike",
            title="Loss spike",
            meaning="The loss leapt far out of its range in one step.",
            explanation=(
                "One bad batch, or one step that was too large: the gradient of that step is many "
                "times the usual one, and Adam's second moment remembers it for long."
            ),
            action=(
                "Look at that step's data; clip the gradient norm; skip batches whose norm is "
                "several times the usual."
            ),
            source="Chowdhery et al. 2022, PaLM, section 5.1",
        ),
        Kind(
            name="plateau",
            title="Plateau",
            meaning="The loss is where it began: nothing is learnt.",
            explanation=(
                "Labels that do not belong to their inputs, a softmax before the cross-entropy, a "
                "memory longer than the network's: the gradients are noise, and their mean is 0."
            ),
            action=(
                "Try to overfit ten samples: if that fails, look at labels, loss and the path from "
                "input to output; else at the model's capacity and the learning rate."
            ),
            source="Goodfellow, Bengio and Courville 2016, section 11.5",
        ),
        Kind(
            name="poor_initialisation",
            title="Poor initialisation",
            meaning="The weights start too small or too large for this depth.",
            explanation=(
                "A layer multiplies its signal by about sqrt(fan in) times the RMS of its weights. "
                "Off by a factor a layer, n layers are off by its n-th power, forwards and back."
            ),
            action=(
                "Xavier initialisation for tanh and sigmoid, He for ReLU (torch.nn.init), or "
                "normalisation layers."
            ),
            source="Glorot and Bengio 2010, section 4.2; He et al. 2015, section 2.2",
        ),
        Kind(
            name="symmetric_units",
            title="Symmetric units",
            meaning="All weights of a layer are equal, so its units are copies of one another.",
            explanation=(
                "Units with equal weights compute the same output. Where they also weigh the same "
                "in the next layer they get the same gradient, and stay equal for ever."
            ),
            action="Initialise weights at random (torch.nn.init); constants are for biases.",
            source="Goodfellow, Bengio and Courville 2016, section 8.4",
        ),
        Kind(
            name="weights_shrinking",
            title="Weights melt away",
            meaning="Weight decay is stronger than what the network learns.",
            explanation=(
                "Decay multiplies the weights by 1 - rate * decay at each step: at 0.001 * 50 "
                "half of them is gone after 14 steps."
            ),
            action="Lower weight_decay (1e-4 to 0.1 is usual); leave biases and norms out of it.",
            source="Loshchilov and Hutter 2019, Decoupled weight decay",
        ),
        Kind(
            name="clipping",
            title="Clipped at every step",
            meaning="The gradient norm is cut at every step, and hardly anything is left of it.",
            explanation=(
                "Clipping is for rare large gradients. When its limit lies below all of them, each "
                "step has the same length, whatever the gradient says."
            ),
            action="Raise max_norm to the usual norm before clipping, or raise the learning rate.",
            source="Pascanu, Mikolov and Bengio 2013, section 3.2",
        ),
        Kind(
            name="underflow",
            title="Gradients underflow in 16 bits",
            meaning="Gradients are too small for float16, and most have become 0.",
            explanation=(
                "float16 has no number between 0 and 2^-24 (6e-8), and loses precision below "
                "2^-14 (6e-5). Gradients of a small loss lie there."
            ),
            action="Scale the loss (torch.amp.GradScaler), or use bfloat16.",
            source="Micikevicius et al. 2018, Mixed precision training, section 3.2",
        ),
        Kind(
            name="amp_skips",
            title="Mixed precision skips steps",
            meaning="The loss scale is halved again and again, and steps are lost.",
            explanation=(
                "GradScaler skips a step whose gradients overflow and halves the scale. A few "
                "skips are its way to find the scale; when they do not end, gradients are not "
                "finite at any scale."
            ),
            action=(
                "Look for NaN or Inf in the loss and the forward pass with autocast off; use "
                "bfloat16."
            ),
            source="PyTorch documentation, Automatic mixed precision examples",
        ),
        Kind(
            name="rank_drift",
            title="Ranks drift apart",
            meaning="Weights that should be the same on every rank are not any more.",
            explanation=(
                "Replicas stay equal because each applies the same gradients to the same weights. "
                "Without that (no_sync left on, a layer that one rank's optimizer lacks, a module "
                "that bypasses its wrapper) each rank trains a model of its own."
            ),
            action=(
                "Call the wrapped module and leave no_sync at the last backward before a step; "
                "give every rank's optimizer the same parameters; then load one checkpoint on all "
                "ranks."
            ),
            source="Li et al. 2020, PyTorch Distributed, section 3.2; BigScience 2022, BLOOM "
            "chronicles, on layer norms out of sync",
        ),
        Kind(
            name="straggler",
            title="One rank is slow",
            meaning="All ranks wait for the same one, at every step.",
            explanation=(
                "A step of several ranks is as long as that of the slowest: the others wait in "
                "the all-reduce. Their step times are equal, but not the time that each of them "
                "needs for itself."
            ),
            action=(
                "Look at that rank's data loading, its share of the data, and its machine: clock "
                "rate, temperature, other processes, network."
            ),
            source="Jiang et al. 2024, MegaScale, section 5",
        ),
        Kind(
            name="stalled_run",
            title="No step any more",
            meaning="The job has not ended, and nothing was heard of it for long.",
            explanation=(
                "A job that is killed (out of memory, preempted, a lost machine) cannot say so, "
                "and one that hangs (a collective that one rank never entered, a full disk, a "
                "stuck data loader) does not know."
            ),
            action=(
                "See whether the process lives (py-spy dump shows where it stands) and what the "
                "scheduler says of it; start it again from its last checkpoint."
            ),
            source="Jiang et al. 2024, MegaScale, section 4",
        ),
        Kind(
            name="reference_mismatch",
            title="Wrong gradients",
            meaning="A layer's gradient is not what a reference computes of the same numbers.",
            explanation=(
                "A custom backward with a wrong sign or factor, a kernel that is broken for this "
                "shape or type, a chip that computes wrongly: training goes on with a gradient "
                "that is not the loss's, and may even look healthy."
            ),
            action=(
                "Test the function named here with torch.autograd.gradcheck and gradwatch doctor; "
                "for a layer of torch's own compute the step again on the CPU and on another "
                "device, and report the kernel or replace the chip."
            ),
            source="Griewank and Walther 2008, chapter 3; Hochschild et al. 2021, Cores that "
            "don't count",
        ),
    )
}
