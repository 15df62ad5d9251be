"""Packages of a finished model for the programs that serve it: GGUF for llama.cpp, Triton repositories."""
