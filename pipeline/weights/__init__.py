"""Weight import and export: ``init_from``, public weight layouts, pretrained models, exports."""
