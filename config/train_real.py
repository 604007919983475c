# Features of photographs, (64, 1280) -> (64, 768): a model for a CPU.
#   python prepare.py SHARDS --out=data/real
#   python train.py config/train_real.py
#   python sample.py --out_dir=out-real
# With 6,570 training samples this takes 39 minutes of processor time, the first of them for the
# prior, and ends at a validation loss of 1.06 (two seeds), with samples whose neighbours are as
# alike as the truth's. With a tenth of the samples the model knows them by heart: stop sooner.
out_dir = "out-real"
data_dir = "data/real"
eval_interval = 1000
eval_samples = 32
save_interval = 3000
batch_size = 4
gradient_accumulation_steps = 2
dim = 256
n_layer = 2
n_head = 4
max_iters = 12_000
learning_rate = 4e-3
warmup_iters = 50
weight_decay = 0.01
ema_decay = 0.99
compile = False  # so small a model waits for the CPU, on a GPU too
