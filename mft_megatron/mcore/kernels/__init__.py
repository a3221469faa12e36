"""Operations of layers, each one function for CPU and GPU that keeps little for its backward pass, or adds in fp32."""
