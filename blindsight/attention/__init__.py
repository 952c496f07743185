"""What a rewritten graph computes: masks, block tables, and FlexAttention with them.

To be read in this order: ``interval_masks`` (what a category keeps, as intervals of keys per
query), ``base_mask`` (the model's own mask, and how it is joined), ``intervals`` (both of them with
tokens sorted), ``block_tables`` (which blocks to visit), ``mask_forms`` (these together, as a graph
calls them), ``flex`` and ``attend`` (attention). ``packing``, ``chunks``, ``region`` and
``mask_operator`` each serve one of these. Nothing here knows of graphs or of models.
"""
