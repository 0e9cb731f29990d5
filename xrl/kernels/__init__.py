"""Operations worth a kernel of our own: each is a public function beside its plain PyTorch reference.

head/ has the log-probs and the loss, layers/ the training pass, decode/ the engine's steps.
"""
