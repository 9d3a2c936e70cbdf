"""The embedded model's world: scenes of simple shapes, their captions, a scorer that reads pictures, own tokenizers.

Nothing is imported here, so `import mmdit` stays light: `from mmdit.demo import scenes, captions, score, vocab`.
"""
