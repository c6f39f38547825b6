"""What the bulk jobs do with a unit of work: shard, distill, encode, decode."""
