"""LoRAs trained on pictures: DreamBooth, of one person or of many side by side."""
