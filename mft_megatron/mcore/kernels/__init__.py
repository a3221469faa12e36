"""Operations of this project's layers, each one function for CPU and CUDA that keeps little for its backward pass."""
