"""The policy as a megatron-core GPTModel, DeepSeek-V3 or a dense student: configuration to one rank's chunks."""
