class Encoded: pass
