"""Registries of weights: immutable versions named by checksum, and aliases that move by compare-and-swap.

A registry is a folder on any storage. This room must not know who trains, evaluates or uses the weights.

    versions/<id>/version.json                      the version, created last with put-if-absent
    versions/<id>/<time>-<attempt>/NAME.safetensors the weights, their card NAME.json beside them
    versions/<id>/<time>-<attempt>/evidence/*       why the version is trusted: an evaluation, the plan that made it
    aliases/<alias>/<number>.json                   a journal: the newest entry is where the alias points

`<id>` is the first 16 digits of the checksum of the weights.
"""
