"""In place of LMDeploy's other compiled module, which links the CUDA runtime: nothing here decodes by a grammar."""


class TokenizerInfo:
    pass
