"""The policy: DeepSeek-V3 as a megatron-core GPTModel, from our configuration to the chunks of one pipeline rank."""
