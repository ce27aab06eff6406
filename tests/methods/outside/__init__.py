"""Nine methods from outside the package, each in one file, by public means only: what the contract has to carry."""

from outside import adalora, bottleneck, dora, eva, ia3, loha, pissa, prefix, vera

__all__ = ["adalora", "bottleneck", "dora", "eva", "ia3", "loha", "pissa", "prefix", "vera"]
