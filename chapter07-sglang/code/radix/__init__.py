"""What chapter 7's scripts share: the prefix tree, the traces, SGLang's server and its settings."""
