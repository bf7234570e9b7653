"""Shell-LCC guidance (arXiv 2606.30248): corrects the model's x0 prediction at every sampling step."""

from comfy_api.latest import io

from .latents import require_model_space
from .shell_lcc_pull import method_inputs, pull_settings, show_outside, trust_input
from .shell_lcc_type import ShellLCCType
from .shell_strip import ShellStrip

KEY = "intrinsic_reward_shell_lcc"


def in_window(sampling, sigma, start_percent: float, end_percent: float) -> bool:
    """Whether a step's sigma lies between the two percents of the noise schedule `sampling`."""
    return bool(sampling.percent_to_sigma(end_percent) <= sigma <= sampling.percent_to_sigma(start_percent))


def is_last_step(args: dict) -> bool:
    """Whether a post-CFG function is called at the last noise level that the schedule samples from."""
    schedule = args["model_options"].get("transformer_options", {}).get("sample_sigmas")
    return schedule is not None and len(schedule) > 1 and bool(args["sigma"][0] <= schedule[-2] + 1e-6)


class ShellLCCGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_ShellLCCGuidance",
            display_name="Shell-LCC Guidance",
            category="model/patch/wan",
            description=(
                "Corrects the model's prediction of the clean latent at every sampling step: tokens that are smoother "
                "or noisier than those of real video are pulled back to the manifold's shell. Brings samples of at most ten "
                "steps nearer to those of many steps; use it there, and not with 20 steps. Needs no training and no extra "
                "model call. The manifold must belong to the model's VAE."
            ),
            search_aliases=["guidance", "wan", "shell lcc", "manifold guidance", "intrinsic reward", "detail", "few steps"],
            inputs=[
                io.Model.Input("model", tooltip="A video model, such as Wan2.1, before or after LoRA and shift nodes."),
                ShellLCCType.Input("manifold", tooltip="From Load Shell-LCC Manifold or Fit Shell-LCC."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="0 returns the model unchanged, 1 pulls all the way to the target, above 1 overshoots.",
                ),
                *method_inputs("band"),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "Share of the noise schedule at which guidance starts. In the pack's benchmark no window was better "
                        "than the whole schedule."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Share of the noise schedule at which guidance ends; 1 is the last step.",
                ),
                trust_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with guidance; the input model itself when strength is 0.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, manifold, strength, method, target, radius, start_percent, end_percent, trust
    ) -> io.NodeOutput:
        if start_percent > end_percent:
            raise ValueError(
                f"Shell-LCC Guidance: start_percent {start_percent:g} is after end_percent {end_percent:g}; swap them"
            )
        if strength == 0:
            return io.NodeOutput(model)
        shell = manifold.manifold
        require_model_space(model, shell.space, f"Shell-LCC Guidance: manifold '{shell.name}'")
        settings = pull_settings(shell, method, target, radius, strength, trust)
        node_id = cls.hidden.unique_id
        strip = ShellStrip(shell, node_id)

        def correct(args):
            x0 = args["denoised"]
            # Read the schedule while sampling: a shift node after this one changes it.
            if not in_window(args["model"].model_sampling, args["sigma"][0], start_percent, end_percent):
                return x0
            if x0.ndim != 5:
                raise ValueError(
                    "Shell-LCC Guidance: expected a video latent [batch, channels, frames, height, width] while "
                    f"sampling, found shape {list(x0.shape)}; audio-video models and image latents are not supported"
                )
            corrected = shell.pull(x0, **settings)
            last = is_last_step(args)
            # Before the last step the prediction is nearly the clip, and comparable with real ones.
            if last:
                show_outside(shell, x0, "of this clip", "Shell-LCC Guidance", node_id)
            strip.step(args, x0, corrected, last)
            return corrected

        m = model.clone()
        m.set_model_sampler_post_cfg_function(correct)
        present = m.get_additional_models_with_key(KEY)
        if not any(manifold.patcher.is_clone(p) for p in present):
            m.set_additional_models(KEY, [*present, manifold.patcher])
        return io.NodeOutput(m)


NODES = [ShellLCCGuidance]
