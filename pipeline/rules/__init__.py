"""Update rules as they are learned: roll-outs stored in Parquet, learning from them, and learning without files."""
