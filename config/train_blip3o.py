# BLIP3-o's DiT and how it is trained: cross-attention to a projection of the condition, raw
# embeddings, uniform t, noise minus data, and zero in place of a dropped condition. What of BLIP3-o
# is not here: docs/blip3o.md.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_blip3o.py --data_dir=data/mine
# or, from the weights of such a model:
#   python train.py config/train_blip3o.py --init_from=FOLDER --data_dir=data/mine
# With --cond_projection=False it is diffusers' LuminaNextDiT2DModel. Averaged weights are ours:
# --ema_decay=0 is without. train.py's defaults learn faster (docs/performance.md).
conditioning = "cross"
cond_projection = True
conv = False
prior = False
rope = "lumina"
normalize = "none"
t_shift = 1.0
learn_null_cond = False
learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 300  # 0.3% of max_iters
weight_decay = 0.0
beta2 = 0.999
