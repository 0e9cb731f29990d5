"""Operations worth a kernel of our own: each is a public function beside its plain PyTorch reference."""
