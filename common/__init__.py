"""What the three applications share: frozen backbones, runtime, language scoring, training, report."""
