from .conventions import check_floatx
from .distillation import load_teacher, make_distiller
from .plain_network import NetworkBuilder, build_network, load_model, recalibrate
from .supernet import Supernet
