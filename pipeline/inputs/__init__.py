"""Finds and reads the inputs of jobs: folders, globs, tars, tables, shards and targets, in a fixed order.

This folder must not know what jobs make of the images.
"""
