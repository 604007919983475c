# BLIP3-o's own model and recipe: NextDiT with cross-attention, as in diffusers, and uniform t.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_blip3o.py --data_dir=data/mine
# or, from the weights of such a model:
#   python train.py config/train_blip3o.py --init_from=FOLDER --normalize=none \
#       --learning_rate=1e-5 --data_dir=data/mine
# Its weights can be written for diffusers. The default recipe learns faster (RECORDS.md).
conditioning = "cross"
conv = False
prior = False
rope = "lumina"
t_shift = 1.0
learning_rate = 1e-4
