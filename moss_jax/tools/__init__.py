"""What developers run: parity, bench, compile."""
