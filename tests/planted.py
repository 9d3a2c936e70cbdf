"""Faults to plant in a pipeline, ours and diffusers' (`their_...`): each breaks one thing."""

from dataclasses import replace
from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers.activations import ACT2FN

from encoders import TextRules
from encoders.clip import QuickGELU
from mmdit import PROFILES


def swapped(parameter):
    parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def transposed(parameter, *sides):
    parameter.data = parameter.data.transpose(*(sides or (0, 1))).contiguous()


def lose(encoder, token, instead):
    encoder.register_forward_pre_hook(lambda _, args: (args[0].masked_fill(args[0] == token, instead), *args[1:]))


def swap_the_final_adaln(pipe):
    swapped(pipe.transformer.final_layer.adaLN_modulation[1].weight)


def swap_the_last_context_adaln(pipe):
    swapped(pipe.transformer.joint_blocks[-1].context_block.adaLN_modulation[1].weight)


def a_wrong_shift(pipe):
    pipe.shift = 1.0


def a_missing_end(pipe):
    lose(pipe.t5, pipe.tokenizers.t5.eos, pipe.tokenizers.t5.pad)


def a_transposed_weight(pipe):
    transposed(pipe.transformer.joint_blocks[1].x_block.attn.proj.weight)


def a_wrong_t5_length(pipe):
    pipe.profile = replace(PROFILES["diffusers"], text=TextRules(t5_length=77))


def a_lost_qk_norm(pipe):
    for stream in (pipe.transformer.joint_blocks[1].context_block, pipe.transformer.joint_blocks[1].x_block):
        stream.attn.ln_q = stream.attn.ln_k = torch.nn.Identity()


def a_wrong_vae_scale(pipe):
    pipe.vae.config = replace(pipe.vae.config, scale=1.0)


def a_wrong_activation(pipe):
    pipe.clip_g.text_model.encoder.layers[1].mlp.act = QuickGELU()


def a_tower_of_another_activation(pipe):
    pipe.clip_g.config = replace(pipe.clip_g.config, activation="quick_gelu")
    for layer in pipe.clip_g.text_model.encoder.layers:
        layer.mlp.act = QuickGELU()


def no_t5_bias(pipe):
    pipe.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()


def an_unprojected_clip_l(pipe):
    pipe.profile = replace(PROFILES["diffusers"], text=TextRules(project_clip_l=False))


def a_wrong_padding(pipe):
    clip_g = replace(pipe.tokenizers.clip_g, pad=pipe.tokenizers.clip_l.pad)
    pipe.tokenizers = replace(pipe.tokenizers, clip_g=clip_g)


def another_embedding(pipe):
    swapped(pipe.clip_l.text_model.embeddings.position_embedding.weight)


def other_noise(pipe):
    noise = pipe.noise
    pipe.noise = lambda seed, **sizes: noise(seed + 1, **sizes)


def rounded_levels(pipe):
    predict = pipe.predict
    pipe.predict = lambda x, sigma, conditionings, **rest: predict(x, round(sigma, 2), conditionings, **rest)


def exchanged_prompts(pipe):
    sample = pipe.sample
    pipe.sample = lambda cond, uncond, noise, **settings: sample(uncond, cond, noise, **settings)


def exchanged_sine_and_cosine(pipe):
    weight = pipe.transformer.t_embedder.mlp[0].weight
    weight.data = weight.data.roll(128, dims=1)


def transposed_patches(pipe):
    transposed(pipe.transformer.x_embedder.proj.weight, 2, 3)


def a_shifted_position_table(pipe):
    pipe.transformer.pos_embed = pipe.transformer.pos_embed.roll(1, dims=1)


def a_lost_second_attention(pipe):
    attn2 = pipe.transformer.joint_blocks[0].x_block.attn2
    attn2.register_forward_hook(lambda module, args, update: torch.zeros_like(update))


def exchanged_axes(pipe):
    unpatchify = pipe.transformer.unpatchify
    pipe.transformer.unpatchify = lambda *args: unpatchify(*args).flip(3)


def weaker_guidance(pipe):
    sample = pipe.sample
    pipe.sample = lambda *args, guidance_scale, **settings: sample(*args, guidance_scale=5.0, **settings)


def a_wrong_solver(pipe):
    sample = pipe.sample

    def steps(*args, **settings):
        for step in sample(*args, **settings):
            step.x = step.x * 1.001
            yield step

    pipe.sample = steps


def a_transposed_vae_weight(pipe):
    transposed(pipe.vae.decoder.up[2].block[0].conv1.weight)


def a_wrong_range(pipe):
    decode = pipe.decode
    pipe.decode = lambda latent, **how: decode(latent, **how) ** 2.2


def truncated_levels(pipe):
    pipe.profile = replace(PROFILES["diffusers"], to_uint8="truncate")


def a_nan(pipe):
    pipe.vae.decoder.conv_out.bias.data[0] = torch.nan


def their_swapped_adaln(pipe):
    swapped(pipe.transformer.norm_out.linear.weight)


def their_transposed_weight(pipe):
    transposed(pipe.transformer.transformer_blocks[1].attn.to_out[0].weight)


def their_transposed_query(pipe):
    transposed(pipe.transformer.transformer_blocks[2].attn.to_q.weight)


def their_lost_qk_norm(pipe):
    pipe.transformer.transformer_blocks[1].attn.norm_added_q = None


def their_wrong_shift(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)


def their_missing_end(pipe):
    lose(pipe.text_encoder_3, pipe.tokenizer_3.eos_token_id, pipe.tokenizer_3.pad_token_id)


def their_wrong_t5_length(pipe):
    pipe.encode_prompt = partial(pipe.encode_prompt, max_sequence_length=77)


def their_wrong_vae_scale(pipe):
    pipe.vae.register_to_config(scaling_factor=1.0)


def their_wrong_activation(pipe):
    pipe.text_encoder_2.text_model.encoder.layers[1].mlp.activation_fn = ACT2FN["quick_gelu"]


def their_lost_t5_bias(pipe):
    pipe.text_encoder_3.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()


def their_transposed_vae_weight(pipe):
    transposed(pipe.vae.decoder.up_blocks[1].resnets[0].conv1.weight)


def their_truncated_levels(pipe):
    class Truncating(type(pipe.image_processor)):
        @staticmethod
        def numpy_to_pil(images):
            return [(image * 255).astype("uint8") for image in images]

    pipe.image_processor = Truncating(vae_scale_factor=8)
