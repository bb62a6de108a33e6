"""Which patcher, the overlay's or the base's, handles each method and attribute of core's patchers.

See overlay.py. A test walks the patcher classes of the installed core and fails on a name that is not in these tables.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OWNERS: dict[str, frozenset[str]] = {
    # Loading and offloading. Core calls these on both patchers, so each handles its own layers.
    "own layers": _names(
        """
        load _load_list patch_model unpatch_model partially_load partially_unload detach model_size loaded_size
        lowvram_patch_counter pinned_memory_size loaded_ram_size get_ram_usage partially_unload_ram
        unregister_inactive_pins restore_loaded_backups unpin_all_weights _vbar_get set_in_use_by_current_prompt
        current_loaded_device inject_model eject_model __del__
        """
    ),
    # About one weight, module or attribute, named by the first argument: its owner handles it.
    "by name": _names(
        """
        patch_weight_to_device pin_weight_to_device unpin_weight add_weight_wrapper add_object_patch get_model_object
        """
    ),
    # About modules that are replaced while a model is loaded; these are nearly always in the base.
    "base": _names("set_injections remove_injections get_injections"),
    # Calls that both handle; defined in OverlayPatcher.
    "both": _names(
        """
        add_patches get_key_patches add_hook_patches set_model_compute_dtype clone_has_same_weights use_ejected
        model_patches_models register_load_device
        """
    ),
    # Return another patcher; OverlayPatcher.clone decides whether it is on the same base.
    "copies": _names(
        "clone deepclone_multigpu match_multigpu_clones get_clone_model_override get_non_dynamic_delegate"
    ),
    # About the model as a whole: options, wrappers, hooks, state dicts (which list both).
    "overlay": _names(
        """
        __new__ __init__ is_dynamic is_clone get_free_memory memory_required model_dtype model_patches_to
        model_patches_call_function model_state_dict model_state_dict_for_saving state_dict_for_saving
        calculate_weight cleanup pre_run prepare_state disable_model_cfg1_optimization set_model_sampler_cfg_function
        set_model_sampler_post_cfg_function set_model_sampler_pre_cfg_function
        set_model_sampler_calc_cond_batch_function set_model_unet_function_wrapper set_model_denoise_mask_function
        set_model_patch set_model_patch_replace set_model_attn1_patch set_model_attn2_patch set_model_attn1_replace
        set_model_attn2_replace set_model_attn1_output_patch set_model_attn2_output_patch
        set_model_optimized_attention set_model_input_block_patch set_model_input_block_patch_after_skip
        set_model_output_block_patch set_model_emb_patch set_model_forward_timestep_embed_patch
        set_model_double_block_patch set_model_post_input_patch set_model_noise_refiner_patch
        set_model_middle_block_after_patch set_model_rope_options add_callback add_callback_with_key
        remove_callbacks_with_key get_callbacks get_all_callbacks add_wrapper add_wrapper_with_key
        remove_wrappers_with_key get_wrappers get_all_wrappers set_attachments remove_attachments get_attachment
        set_additional_models remove_additional_models get_additional_models_with_key get_additional_models
        get_nested_additional_models restore_hook_patches set_hook_mode prepare_hook_patches_current_keyframe
        _handle_changed_hook_keyframes register_all_hook_patches get_combined_hook_patches apply_hooks patch_hooks
        patch_cached_hook_weights clear_cached_hook_weights patch_hook_weight_to_device unpatch_hooks clean_hooks
        """
    ),
}

ATTRIBUTES: dict[str, frozenset[str]] = {
    # Copied from the base's MODEL when the overlay is created.
    "carried": _names("model_options wrappers callbacks attachments"),
    # Set on both.
    "both": _names("force_cast_weights load_device offload_device"),
    # The base's patcher has its own, for the shared layers.
    "own layers": _names(
        """
        size patches backup backup_buffers weight_wrapper_patches weight_inplace_update patches_uuid pinned injections
        is_injected skip_injection
        """
    ),
    # Split by name: entries about a shared module are in the base's.
    "by name": _names("object_patches object_patches_backup"),
    # The overlay's only. Hooks name weights of both, and the overlay restores them.
    "overlay": _names(
        """
        model parent additional_models hook_patches hook_patches_backup hook_backup cached_hook_patches current_hooks
        forced_hooks is_clip hook_mode cached_patcher_init is_multigpu_base_clone clone_base_uuid
        non_dynamic_delegate_model
        """
    ),
}
