"""The original project's command: accelerate launch train.py --config configs/{exp_name}.yaml"""

from cytoclip.cli import original_train

if __name__ == "__main__":
    original_train()
