"""tiny-m3: MiniMax-M3's architecture and its EAGLE3 draft, small enough to train in minutes."""
