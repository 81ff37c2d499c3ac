"""Networks that come without their source: exported programs and TorchScript."""
