"""The bulk jobs shard, distill, encode and decode: how each is configured and planned, and what it does with a unit of
work. Nothing here knows Ray, training or the command line.
"""
