"""The engines that gptx is compared with on a GPU."""
