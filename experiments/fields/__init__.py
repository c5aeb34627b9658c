"""DietNeRF: fields, losses and priors compared on scenes with few views."""
