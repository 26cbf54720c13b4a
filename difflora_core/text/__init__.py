"""Text encoders, the words they can learn, and the covariance of their encodings."""
