"""What is compiled for the processor at hand: `kernels.cpp`, how it is built, and how torch's tensors get there."""
