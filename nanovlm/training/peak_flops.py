"""What GPUs could do at best, by the vendor's data sheets."""

_H100 = "NVIDIA H100 data sheet (half of the figure with sparsity)"
_H200 = "NVIDIA H200 data sheet (half of the figure with sparsity)"
_A100 = "NVIDIA A100 data sheet"
_V100 = "NVIDIA V100 data sheet: float16, it has no bfloat16"

PEAK_TFLOPS: dict[str, tuple[float, str]] = {
    "NVIDIA B200": (2250.0, "NVIDIA HGX B200 data sheet (a sixteenth of 8 GPUs with sparsity)"),
    "NVIDIA H200": (989.4, _H200),
    "NVIDIA H200 NVL": (835.5, _H200),
    "NVIDIA H100 80GB HBM3": (989.4, f"{_H100}, SXM"),
    "NVIDIA H100 NVL": (835.5, f"{_H100}, NVL"),
    "NVIDIA H100 PCIe": (756.5, f"{_H100}, PCIe"),
    "NVIDIA A100-SXM4-80GB": (312.0, _A100),
    "NVIDIA A100-SXM4-40GB": (312.0, _A100),
    "NVIDIA A100 80GB PCIe": (312.0, _A100),
    "NVIDIA A100-PCIE-40GB": (312.0, _A100),
    "NVIDIA A10": (125.0, "NVIDIA A10 data sheet"),
    "NVIDIA L40S": (362.05, "NVIDIA L40S data sheet"),
    "NVIDIA L4": (121.0, "NVIDIA L4 data sheet (half of the figure with sparsity)"),
    "NVIDIA GeForce RTX 5090": (209.5, "NVIDIA RTX Blackwell whitepaper, float32 accumulation"),
    "NVIDIA GeForce RTX 4090": (165.2, "NVIDIA Ada whitepaper, float32 accumulation"),
    "NVIDIA GeForce RTX 3090": (71.0, "NVIDIA GA102 whitepaper, float32 accumulation"),
    "Tesla V100-SXM2-16GB": (125.0, _V100),
    "Tesla V100-SXM2-32GB": (125.0, _V100),
    "Tesla V100-PCIE-16GB": (112.0, _V100),
    "Tesla V100-PCIE-32GB": (112.0, _V100),
}
"""Dense bfloat16 products with tensor cores, in TFLOP/s, and where the figure stands; by the name
that `torch.cuda.get_device_name` gives. Names must be equal: `NVIDIA GeForce RTX 4090 D` or a MIG
slice of an A100 is another device."""


def peak_flops_per_second(device_name: str) -> float | None:
    """Return what a GPU of that name does at best, None if it is not in the table."""
    if device_name not in PEAK_TFLOPS:
        return None
    return PEAK_TFLOPS[device_name][0] * 1e12
