"""What a KV group and a neuron cost for a decoded token."""
