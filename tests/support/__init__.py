"""What several tests share: a toy job, pictures, an independent decoder. Holds no tests."""
